"""Exit 0 if the service in this container is ready, 1 otherwise."""

import http.client
import os
import sys

connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("TWOGATE_PORT") or 8000), timeout=2)
try:
    connection.request("GET", "/health/ready")
    response = connection.getresponse()
except OSError as error:
    sys.exit(f"not reachable: {error}")
print(response.read().decode())
sys.exit(0 if response.status == 200 else 1)
