"""The results that methods return, their files, and the claims that they support."""
