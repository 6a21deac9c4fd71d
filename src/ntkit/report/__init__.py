"""Results become tables, pictures and one HTML page. The only importer of matplotlib."""
