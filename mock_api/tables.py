"""The tables of the store, in SQL. Times are Unix seconds of the server's clock.

jobs      needs are copied out of `spec` into columns so that a pull is one indexed query;
          holder: the last account that pulled it; a requeue does not clear it (S5);
          pullers: every account that ever pulled it, ';'-joined (S3);
          deletion_met: an update or the sweep has run into the deletion (S7)
events    the record: who did what to which job, and what the server answered
outbox    e-mails to users: HTML with the worker's details unescaped, as deployed servers do it (S11)
accounts  who may sign in; digest is scrypt of the password, groups a JSON list
objects   the MD5 of a stored object, good while size and mtime are those of the file
"""

TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY, spec TEXT NOT NULL, state TEXT NOT NULL, details TEXT NOT NULL DEFAULT '', "group" TEXT,
    cpu_cores INTEGER, memory INTEGER, gpu_model TEXT, gpu_archi TEXT, gpu_mem INTEGER,
    created REAL NOT NULL, updated REAL NOT NULL, holder TEXT, pullers TEXT NOT NULL DEFAULT '',
    retries INTEGER NOT NULL DEFAULT 0, max_retries INTEGER NOT NULL,
    deleted INTEGER NOT NULL DEFAULT 0, deletion_met INTEGER NOT NULL DEFAULT 0
);
-- the queue in its order; finished jobs, however many, are not in the way of a pull
CREATE INDEX IF NOT EXISTS queue ON jobs (state, id);
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, job_id INTEGER, account TEXT, state TEXT,
    details TEXT, code INTEGER, note TEXT
);
CREATE INDEX IF NOT EXISTS events_of_job ON events (job_id);
CREATE TABLE IF NOT EXISTS outbox (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, job_id INTEGER NOT NULL, subject TEXT NOT NULL, html TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS accounts (
    name TEXT PRIMARY KEY, salt BLOB NOT NULL, digest BLOB NOT NULL, groups TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS tokens (token TEXT PRIMARY KEY, account TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS objects (
    key TEXT PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, md5 TEXT NOT NULL
);
"""
