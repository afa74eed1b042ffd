"""Curves and retrieval pictures, drawn by matplotlib."""
