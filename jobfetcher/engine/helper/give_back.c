/* give_back UID:GID DIR: makes everything in DIR belong to UID:GID, and lets that user read, write and enter it.

   This is the only program in the image in which a worker without root rights has a job's files given back to its user
   (jobfetcher/engine/give_back.py, FAULTS.md E13, T27). Whoever filled DIR may be hostile, so:

   - Nothing but system calls of Linux's own: no C library, no shell, no file of the image besides this program.
   - A file is reached by one name from an open directory, never by a path, and no link is ever followed: a link itself
     is given away, never what it leads to. A mount point inside DIR is left alone, also one of the same disk.
   - Memory and descriptors are bounded: 16 bytes a level, and descriptors for the first KEPT levels. Below these the
     way back up is `..`, and what is found there must be what was left.
   - Bits for set-user-id, set-group-id and the sticky bit go: no program may become the user's own by that.
   - One failure does not end it. The first few are printed, one clean line each, and the exit code is 1.

   Flags of chattr(1) such as "immutable" keep a file from being given back. No job can set them, for none has the
   capability LINUX_IMMUTABLE; only root of the machine can, and only root can take them away.

   scripts/build-helper compiles it for each machine. The files beside this one are what that made. */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef long s64;

/* -- Linux ---------------------------------------------------------------------------------------------------------- */

#if defined(__x86_64__)
enum { WRITE = 1, CLOSE = 3, LSEEK = 8, FCHMOD = 91, FCHOWN = 93, GETDENTS = 217, EXIT = 231, OPENAT = 257,
       FCHOWNAT = 260, STATX = 332 };
enum { DIRECTORY = 0200000, NOFOLLOW = 0400000 };

__asm__(".globl _start\n_start: xor %ebp, %ebp\n mov %rsp, %rdi\n and $-16, %rsp\n call begin\n hlt\n");

static s64 call(s64 number, s64 a, s64 b, s64 c, s64 d, s64 e)
{
    s64 answer;
    register s64 r10 __asm__("r10") = d;
    register s64 r8 __asm__("r8") = e;
    __asm__ volatile("syscall"
                     : "=a"(answer)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return answer;
}
#elif defined(__aarch64__)
enum { FCHMOD = 52, FCHOWNAT = 54, FCHOWN = 55, OPENAT = 56, CLOSE = 57, GETDENTS = 61, LSEEK = 62, WRITE = 64,
       EXIT = 94, STATX = 291 };
enum { DIRECTORY = 040000, NOFOLLOW = 0100000 };

__asm__(".globl _start\n_start: mov x29, #0\n mov x30, #0\n mov x0, sp\n bl begin\n brk #0\n");

static s64 call(s64 number, s64 a, s64 b, s64 c, s64 d, s64 e)
{
    register s64 x8 __asm__("x8") = number;
    register s64 x0 __asm__("x0") = a;
    register s64 x1 __asm__("x1") = b;
    register s64 x2 __asm__("x2") = c;
    register s64 x3 __asm__("x3") = d;
    register s64 x4 __asm__("x4") = e;
    __asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4) : "memory");
    return x0;
}
#else
#error "no numbers of system calls for this machine"
#endif

enum { NONBLOCK = 04000, CLOEXEC = 02000000 };
enum { FDCWD = -100, SYMLINK_NOFOLLOW = 0x100, NO_AUTOMOUNT = 0x800, EMPTY_PATH = 0x1000 };
enum { BASIC_STATS = 0x7ff, MNT_ID = 0x1000 }; /* before Linux 5.8 there is no number of a mount; the disk's decides */
enum { TYPE = 0170000, FOLDER = 0040000, FILE = 0100000 };
enum { ENOENT = 2, EXDEV = 18, ENAMETOOLONG = 36, ESTALE = 116 };

struct seen { /* statx(2) */
    u32 mask, block_size;
    u64 attributes;
    u32 links, user, group;
    u16 mode, spare;
    u64 inode, size, blocks, attributes_mask, times[8];
    u32 its_major, its_minor, disk_major, disk_minor;
    u64 mount, more[13];
};

struct entry { /* getdents64(2) */
    u64 inode;
    s64 next;
    u16 length;
    u8 type;
    char name[];
};

/* -- what is open --------------------------------------------------------------------------------------------------- */

enum { KEPT = 64, DEEPEST = 1 << 20, SHOWN = 5 };

static struct level { /* of every level above this one: which directory it is, and where reading goes on */
    u64 inode;
    s64 next;
} levels[DEEPEST]; /* only what is used takes memory */

static struct place { /* an open directory; the entry of `last` is at work */
    s64 folder, size, at, last;
    char entries[4096] __attribute__((aligned(8)));
} kept[KEPT], deep;

static u64 depth, failures, user, group;
static struct seen top;

static struct place *place_of(u64 level)
{
    return level < KEPT ? &kept[level] : &deep;
}

static struct entry *entry_of(struct place *place)
{
    return (struct entry *)(place->entries + place->last);
}

/* -- words ---------------------------------------------------------------------------------------------------------- */

static char line[600];
static u64 used;

static void put(char c)
{
    if (used < sizeof line - 1)
        line[used++] = c;
}

static void put_text(const char *text)
{
    while (*text)
        put(*text++);
}

static void put_number(u64 number)
{
    char digits[20];
    int count = 0;
    do
        digits[count++] = '0' + number % 10;
    while (number /= 10);
    while (count)
        put(digits[--count]);
}

/* A name of a job's choice: what is no printable ASCII as \xNN, and no more than so much of it. */
static void put_name(const char *name)
{
    static const char hex[] = "0123456789abcdef";
    for (int count = 0; *name; name++, count++) {
        u8 c = *name;
        if (count == 60) {
            put_text("...");
            return;
        }
        if (c >= ' ' && c < 127 && c != '\\') {
            put(c);
        } else {
            put_text("\\x");
            put(hex[c >> 4]);
            put(hex[c & 15]);
        }
    }
}

static void print(void)
{
    line[used] = '\n';
    call(WRITE, 1, (s64)line, used + 1, 0, 0);
    used = 0;
}

/* `name` in the directory at work (none: the directory above all) could not be given back; `answer` is -errno. */
static void failed(const char *name, s64 answer)
{
    if (++failures > SHOWN)
        return;
    for (u64 level = 0; level < depth && level < KEPT && used < 300; level++) {
        put_name(entry_of(&kept[level])->name);
        put('/');
    }
    if (depth > KEPT)
        put_text(".../");
    put_name(name ? name : ".");
    put_text(": errno ");
    put_number(-answer);
    print();
}

/* -- one file ------------------------------------------------------------------------------------------------------- */

static s64 look(s64 folder, const char *name, struct seen *seen)
{
    s64 how = SYMLINK_NOFOLLOW | NO_AUTOMOUNT | (*name ? 0 : EMPTY_PATH);
    return call(STATX, folder, (s64)name, how, BASIC_STATS | MNT_ID, (s64)seen);
}

static int is_outside(const struct seen *seen)
{
    return seen->disk_major != top.disk_major || seen->disk_minor != top.disk_minor ||
           ((seen->mask & top.mask & MNT_ID) && seen->mount != top.mount);
}

static int is_folder(const struct seen *seen)
{
    return (seen->mode & TYPE) == FOLDER;
}

static int is_theirs(const struct seen *seen)
{
    return seen->user != user || seen->group != group;
}

/* The mode that it gets: rw for its user, and x for a directory and for what somebody may run. */
static u32 mode_of(const struct seen *seen)
{
    u32 mode = seen->mode & 0777;
    return mode | (is_folder(seen) || (mode & 0111) ? 0700 : 0600);
}

static int is_closed(const struct seen *seen)
{
    return (seen->mode & 07777) != mode_of(seen);
}

/* Of an open file or directory. The owner first: that takes bits off the mode. */
static s64 give_open(s64 file, const struct seen *seen)
{
    s64 answer = 0, other = 0;
    if (is_theirs(seen))
        answer = call(FCHOWN, file, user, group, 0, 0);
    if (is_closed(seen))
        other = call(FCHMOD, file, mode_of(seen), 0, 0, 0);
    return answer ? answer : other;
}

static s64 give_file(s64 folder, const char *name, const struct seen *seen)
{
    struct seen now;
    s64 answer = 0, file, other;
    if (is_theirs(seen))
        answer = call(FCHOWNAT, folder, (s64)name, user, group, SYMLINK_NOFOLLOW);
    if (answer || (seen->mode & TYPE) != FILE || !is_closed(seen))
        return answer;
    file = call(OPENAT, folder, (s64)name, NOFOLLOW | NONBLOCK | CLOEXEC, 0, 0); /* read-only is 0 */
    if (file < 0)
        return file;
    other = look(file, "", &now);
    if (!other && now.inode != seen->inode)
        other = -ESTALE;
    answer = other ? other : call(FCHMOD, file, mode_of(seen), 0, 0, 0);
    call(CLOSE, file, 0, 0, 0, 0);
    return answer;
}

/* -- the walk ------------------------------------------------------------------------------------------------------- */

static void enter(s64 folder, u64 inode, u64 level)
{
    struct place *place = place_of(level);
    if (level > KEPT) /* the one above has lost its place to this one */
        call(CLOSE, place->folder, 0, 0, 0, 0);
    place->folder = folder;
    place->size = place->at = 0;
    levels[level].inode = inode;
    depth = level;
}

static void give_folder(struct place *here, const char *name, const struct seen *seen)
{
    struct seen now;
    s64 inner = call(OPENAT, here->folder, (s64)name, DIRECTORY | NOFOLLOW | CLOEXEC, 0, 0);
    s64 answer = inner < 0 ? inner : look(inner, "", &now);
    if (!answer && (now.inode != seen->inode || is_outside(&now)))
        answer = -ESTALE;
    if (inner < 0 || answer) {
        failed(name, answer);
        if (inner >= 0)
            call(CLOSE, inner, 0, 0, 0, 0);
        return;
    }
    answer = give_open(inner, &now);
    if (answer)
        failed(name, answer);
    if (depth + 1 == DEEPEST) {
        failed(name, -ENAMETOOLONG);
        call(CLOSE, inner, 0, 0, 0, 0);
        return;
    }
    enter(inner, now.inode, depth + 1);
}

static void give(struct place *here, const char *name)
{
    struct seen seen;
    s64 answer = look(here->folder, name, &seen);
    if (answer == -ENOENT)
        return;
    if (!answer && is_outside(&seen))
        answer = -EXDEV;
    if (!answer && is_folder(&seen)) {
        give_folder(here, name, &seen);
        return;
    }
    if (!answer)
        answer = give_file(here->folder, name, &seen);
    if (answer)
        failed(name, answer);
}

/* To the level above, whose reading goes on behind the entry that was entered. Where that is not there any more, to the
   nearest one that is open. */
static void leave(void)
{
    struct place *place = place_of(depth);
    struct seen above;
    s64 folder;
    if (depth <= KEPT) {
        call(CLOSE, place->folder, 0, 0, 0, 0);
        depth--;
        return;
    }
    folder = call(OPENAT, place->folder, (s64) "..", DIRECTORY | NOFOLLOW | CLOEXEC, 0, 0);
    if (folder < 0 || look(folder, "", &above) || is_outside(&above) || above.inode != levels[depth - 1].inode ||
        call(LSEEK, folder, levels[depth - 1].next, 0, 0, 0) < 0) {
        failed("..", folder < 0 ? folder : -ESTALE);
        if (folder >= 0)
            call(CLOSE, folder, 0, 0, 0, 0);
        call(CLOSE, place->folder, 0, 0, 0, 0);
        depth = KEPT - 1;
        return;
    }
    call(CLOSE, place->folder, 0, 0, 0, 0);
    place->folder = folder;
    place->size = place->at = 0;
    depth--;
}

static void walk(void)
{
    for (;;) {
        struct place *here = place_of(depth);
        struct entry *entry;
        const char *name;
        if (here->at >= here->size) {
            here->size = call(GETDENTS, here->folder, (s64)here->entries, sizeof here->entries, 0, 0);
            here->at = 0;
            if (here->size < 0)
                failed(".", here->size);
            if (here->size <= 0) {
                if (depth == 0)
                    return;
                leave();
                continue;
            }
        }
        here->last = here->at;
        entry = entry_of(here);
        here->at += entry->length;
        levels[depth].next = entry->next;
        name = entry->name;
        if (name[0] == '.' && (!name[1] || (name[1] == '.' && !name[2])))
            continue;
        give(here, name);
    }
}

/* -- the command ---------------------------------------------------------------------------------------------------- */

/* A user's or group's number, and what follows it; no number: 0. The largest one means "none" to Linux. */
static const char *read_number(const char *text, u64 *number)
{
    const char *c = text;
    for (*number = 0; *c >= '0' && *c <= '9' && *number < 0xffffffff; c++)
        *number = *number * 10 + (*c - '0');
    return c == text || *number >= 0xffffffff ? 0 : c;
}

__attribute__((noreturn)) static void leave_with(s64 code)
{
    for (;;)
        call(EXIT, code, 0, 0, 0, 0);
}

__attribute__((noreturn, used)) void begin(s64 *stack)
{
    const char **arguments = (const char **)(stack + 1);
    const char *rest = 0;
    s64 folder, answer;
    if (stack[0] == 3)
        rest = read_number(arguments[1], &user);
    if (rest)
        rest = *rest == ':' ? read_number(rest + 1, &group) : 0;
    if (!rest || *rest) {
        put_text("usage: give_back UID:GID DIR");
        print();
        leave_with(2);
    }
    folder = call(OPENAT, FDCWD, (s64)arguments[2], DIRECTORY | NOFOLLOW | CLOEXEC, 0, 0);
    answer = folder < 0 ? folder : look(folder, "", &top);
    if (answer) {
        failed(0, answer);
    } else {
        answer = give_open(folder, &top);
        if (answer)
            failed(0, answer);
        enter(folder, top.inode, 0);
        walk();
    }
    if (failures) {
        put_number(failures);
        put_text(" could not be given back");
        print();
    }
    leave_with(failures != 0);
}
