"""Slopes: how every score's loss moves with every coefficient, and where that leads."""
