"""Losses of the detection half."""
