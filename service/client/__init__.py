"""For applications that take uploads: ask a running Twogate before an image is stored.

Standard library only, and nothing of the rest of this project: a folder that may be copied into another application
under any name. `TwogateClient` asks; `asgi.TwogateMiddleware` and `wsgi.TwogateMiddleware` ask in front of an app.
"""

from .client import Answer, Outcome, TwogateClient

__all__ = ["Answer", "Outcome", "TwogateClient"]
