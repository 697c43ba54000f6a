"""The backend ``loky`` of evalkit."""
