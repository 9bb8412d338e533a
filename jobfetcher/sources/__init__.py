"""Where jobs come from: one adapter per kind of server, each implementing core.ports.JobSource."""
