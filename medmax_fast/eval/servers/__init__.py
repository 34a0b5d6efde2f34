"""Servers that speak the OpenAI protocol: one client for the models asked and the judges, and what they cost."""
