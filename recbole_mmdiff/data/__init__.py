"""Data: all that knows RecBole's Dataset."""
