"""Published decoders around SJD2, each only that method's own part; what needs no code of its own is a yaml alone."""
