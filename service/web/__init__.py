"""The web: REST API, health and the dashboard. Reads what the other steps recorded; its commands are transitions."""
