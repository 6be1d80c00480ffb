"""Model loading, adapters, teachers, packed batches, attention, precision and memory."""
