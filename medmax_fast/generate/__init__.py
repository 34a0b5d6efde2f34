"""Generation of text, pictures and interleaved output."""
