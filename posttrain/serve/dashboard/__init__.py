"""The dashboard: runs, their curves and episodes, data, reports and a chat, on the server's own app."""
