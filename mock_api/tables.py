"""The tables of the store, in SQL. Times are Unix seconds of the server's clock.

jobs      the queue: needs are copied out of `spec` into columns so that a pull is one indexed query;
          holder: the last account that pulled it; a requeue does not clear it (S5);
          pullers: every account that ever pulled it, each after a ';' (S3). A row is gone for good once the server
          has learnt that the user deleted the job (S7), so ids must never be used again: AUTOINCREMENT
user_jobs the user's side, a record of its own: what it was told of each job, which after a failure is less than what
          the queue knows (S19). `id` is the user's number of the job, `meta.job_id`, and `queue_id` the one that
          workers know it by; they differ (S22), here by 1000 at first. `details` are kept here only
heard     every word that reached the user's side, in order; no account: the server's own sweep
events    the record: who did what to which job, and what the server answered
outbox    e-mails to users: HTML with the worker's details unescaped, as deployed servers do it (S11)
accounts  who may sign in; digest is scrypt of the password, groups a JSON list
objects   the MD5 of a stored object, good while size and mtime are those of the file
"""

#: Of these tables. A database of another one cannot be read.
VERSION = 2

TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, spec TEXT NOT NULL, state TEXT NOT NULL,
    "group" TEXT, priority INTEGER NOT NULL, environment TEXT, cpu_cores INTEGER, memory INTEGER, gpu_model TEXT,
    gpu_archi TEXT, gpu_mem INTEGER,
    created REAL NOT NULL, updated REAL NOT NULL, holder TEXT, pullers TEXT NOT NULL DEFAULT '',
    retries INTEGER NOT NULL DEFAULT 0, max_retries INTEGER NOT NULL
);
-- the queue in its order; finished jobs, however many, are not in the way of a pull
CREATE INDEX IF NOT EXISTS queue ON jobs (state, priority DESC, id);
CREATE TABLE IF NOT EXISTS user_jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, queue_id INTEGER NOT NULL UNIQUE, state TEXT NOT NULL,
    details TEXT NOT NULL DEFAULT '', created REAL NOT NULL, updated REAL NOT NULL, deleted INTEGER NOT NULL DEFAULT 0
);
INSERT INTO sqlite_sequence (name, seq)
    SELECT 'user_jobs', 1000 WHERE NOT EXISTS (SELECT * FROM sqlite_sequence WHERE name = 'user_jobs');
CREATE TABLE IF NOT EXISTS heard (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, job_id INTEGER NOT NULL, account TEXT, state TEXT NOT NULL,
    details TEXT NOT NULL
);
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
