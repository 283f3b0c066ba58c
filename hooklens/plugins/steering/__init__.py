"""Steering: directions from contrasts, added to the stream or taken out of it, with what that costs in fluency."""
