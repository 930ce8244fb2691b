"""Nexus: router, domain embeddings, upcycling, extension."""
