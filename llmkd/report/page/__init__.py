"""The report's page: one HTML file that opens offline."""
