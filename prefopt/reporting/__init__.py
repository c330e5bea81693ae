"""Records and data sets become tables, figures and pages; nothing is started or trained here."""
