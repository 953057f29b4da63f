// Ask the gate about an upload; pass it on to the app, or answer in the app's place.
// The body is judged as it came: the subrequest sends the same bytes that the app will get.

const NO_UPLOADS = ['GET', 'HEAD', 'OPTIONS', 'DELETE', 'TRACE'];

async function ask(r) {
    if (NO_UPLOADS.includes(r.method) && !hasBody(r)) {
        return pass(r, '');
    }
    // The gate and the app might each take another boundary, and so see other files.
    const types = r.rawHeadersIn.filter(h => h[0].toLowerCase() === 'content-type');
    if (types.length > 1 || (types.length === 1 && types[0][1].toLowerCase().split('boundary').length > 2)) {
        return problem(r, 400, 'malformed-request', 'Content-Type says two things');
    }
    // The gate would see one image, and some apps a form.
    const type = types.length ? types[0][1].trim() : '';
    if (/multipart|boundary/i.test(type) && !/^multipart\/form-data\s*;/i.test(type)) {
        return problem(r, 400, 'malformed-request', 'Content-Type is nearly that of a form');
    }
    let reply;
    try {
        reply = await r.subrequest('/_twogate/judge', {method: 'POST'});
    } catch (e) {
        return unavailable(r, String(e));
    }
    let document = {};
    try {
        document = JSON.parse(reply.responseText) || {};
    } catch (e) {
        return unavailable(r, 'what answered with ' + reply.status + ' is not the gate');
    }
    const name = String(document.type || '').split('/').pop();
    if (reply.status === 200 && document.flagged === false) {
        return pass(r, 'clean');
    }
    if (reply.status === 422 && name === 'invalid-request') {
        return pass(r, 'nothing');
    }
    if (name === 'adversarial-suspected') {
        // Which image, but no number: scores would tell an attacker which way to go.
        return problem(r, 422, name, 'image ' + document.index + ' looks like an adversarial example');
    }
    if (name && [400, 413, 415, 422].includes(reply.status)) {
        r.headersOut['Content-Type'] = 'application/problem+json';
        return r.return(reply.status, reply.responseText);
    }
    return unavailable(r, name || 'status ' + reply.status);
}

function hasBody(r) {
    const length = r.headersIn['Content-Length'];
    return r.headersIn['Transfer-Encoding'] || (length && length !== '0') || r.variables.request_body_file
        || (r.requestBuffer && r.requestBuffer.length > 0);
}

function pass(r, verdict) {
    r.variables.twogate_verdict = verdict;
    r.internalRedirect('@passed');
}

function unavailable(r, reason) {
    r.error('twogate: unavailable: ' + reason);
    if (r.variables.twogate_unavailable === 'pass') {
        return pass(r, 'unjudged');
    }
    r.headersOut['Retry-After'] = '5';
    return problem(r, 503, 'gate-unavailable', 'uploads cannot be checked at the moment');
}

function problem(r, status, name, detail) {
    r.headersOut['Content-Type'] = 'application/problem+json';
    r.return(status, JSON.stringify({type: '/problems/' + name, title: detail, status: status, detail: detail}));
}

export default {ask};
