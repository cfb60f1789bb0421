"""The trainings that make the embedded model, and captioned scenes as data for all others."""
