"""Loading a model, its adapters, teachers, packed batches and attention, precision and memory."""
