"""What stands between the socket and the endpoints. Pure ASGI: nothing here buffers a body or starts a task."""
