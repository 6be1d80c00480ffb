"""Model loading, adapters, teachers, packed batches, packed attention, precision and memory."""
