"""The fine-tunings that make decoders faster or images better; each is one module with one recipe."""
