"""The service beside the PACS: receives studies, builds and delivers reports. Never imports torch."""
