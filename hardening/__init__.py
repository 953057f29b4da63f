"""Offline: a public encoder and local images in, a hardened bundle out. torch lives here, and only here."""
