"""Fitted curvature for people: figures per layer, a picture of the eigenvalues, a page."""
