"""The core, which knows nothing of HTTP: encoded images in, embeddings and verdicts out."""
