"""The parity matrix: distributed training of real models against one plain transformers process."""
