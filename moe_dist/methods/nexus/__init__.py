"""Nexus (arXiv 2408.15901): dense experts become one mixture, whose router knows them by their domains' embeddings."""
