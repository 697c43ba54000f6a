"""The backend ``ray`` of evalkit."""
