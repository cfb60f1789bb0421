"""Texts as users have them: every character at which `str.splitlines` splits and a file of lines must not."""

SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
