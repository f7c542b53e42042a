"""What both programs agree on: settings, database, audit, messages. A leaf: it imports neither."""

VERSION = "0.1.0"
