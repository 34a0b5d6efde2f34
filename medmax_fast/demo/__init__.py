"""The web page of `medmax demo`."""
