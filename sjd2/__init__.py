"""sjd2: fast decoding of autoregressive text-to-image models, measured so that people believe it."""
