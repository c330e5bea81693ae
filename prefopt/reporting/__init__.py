"""Records become tables and figures; nothing is started or trained here."""
