#!/bin/sh
# Segment the brightest cell of a microscope image and measure it. This is the program that the demo's job runs.
#
#   segment.sh IMAGE.pgm OUT_DIR LOG_DIR [MICROMETRES_PER_PIXEL]
#
# IMAGE is a binary PGM of 8 bits. Writes OUT_DIR/mask.pgm (255 = the cell, 0 = the rest), OUT_DIR/measurements.csv and
# LOG_DIR/segment.log. Needs a POSIX shell with od, awk and tr, and nothing else: busybox is enough.
#
# The threshold is Otsu's (1979): the grey value that splits the histogram into the two classes furthest apart. The cell is
# the largest set of pixels above it that touch along an edge (4-connected); smaller sets are noise and stay out of the mask.
set -eu
export LC_ALL=C # bytes, not characters

image=$1 out=$2 log=$3 scale=${4:-0.107}
mkdir -p "$out" "$log"
trap 'rm -f "$out/mask.txt"' EXIT

# od prints every byte as a number; awk reads the header from the first of them and the pixels from the rest. The mask is
# written as digits first: awk cannot print NUL bytes, tr can.
od -An -v -tu1 "$image" | awk -v scale="$scale" -v mask="$out/mask.txt" -v csv="$out/measurements.csv" -v log_file="$log/segment.log" '
function say(text) { print "segment.sh: " text > log_file; print "segment.sh: " text > "/dev/stderr" }

function fail(why) { say(why); failed = 1; exit 1 }

# Of the header: P5, width, height, maximum, each ended by white space; comments reach from # to the end of the line.
function header(byte,    c) {
    c = sprintf("%c", byte)
    if (comment) { if (c == "\n") comment = 0; return }
    if (c == "#") { comment = 1; return }
    if (byte > 32) { word = word c; return }
    if (word == "") return
    field[++fields] = word; word = ""
    if (fields < 4) return
    if (field[1] != "P5" || field[4] != 255) fail("not a binary PGM of 8 bits")
    width = field[2] + 0; height = field[3] + 0; size = width * height
    in_pixels = 1
}

{ for (i = 1; i <= NF; i++) if (in_pixels) { pixel[n++] = $i; histogram[$i + 0]++ } else header($i + 0) }

# The threshold with the largest variance between classes: below * above * (mean above - mean below)^2.
function otsu(    t, total, below, sum_below, gap, spread, best, found) {
    for (t = 0; t < 256; t++) total += t * histogram[t]
    for (t = 0; t < 255; t++) {
        below += histogram[t]; sum_below += t * histogram[t]
        if (below == 0 || below == size) continue
        gap = (total - sum_below) / (size - below) - sum_below / below
        spread = below * (size - below) * gap * gap
        if (spread > best) { best = spread; found = t }
    }
    if (best == 0) fail("all pixels have the same value: nothing to segment")
    return found
}

# Sets of touching pixels, by runs: a run is a stretch of bright pixels in one row, from `first` to before `end`; it joins
# every run of the row above that it overlaps. The root of the tree of joined runs stands for the set.
function root(run) { while (parent[run] != run) run = parent[run]; return run }

function join(a, b) { a = root(a); b = root(b); if (a < b) parent[b] = a; else parent[a] = b }

function find_runs(    y, x, from, above, this_row, i) {
    for (y = 0; y < height; y++) {
        above = this_row + 0; this_row = runs + 0
        for (x = 0; x < width;) {
            if (pixel[y * width + x] <= threshold) { x++; continue }
            from = x
            while (x < width && pixel[y * width + x] > threshold) x++
            first[runs + 0] = from; end[runs + 0] = x; row[runs + 0] = y; parent[runs + 0] = runs + 0
            while (above < this_row && end[above] <= from) above++
            for (i = above; i < this_row && first[i] < x; i++) join(i, runs + 0)
            runs++
        }
    }
}

# The awk of busybox may be built without sqrt: the method of Heron, from above, so that it falls until it stands still.
function square_root(v,    r, s) { r = v > 1 ? v : 1; while ((s = (r + v / r) / 2) < r) r = s; return r }

function diameter(area) { return 2 * square_root(area / 3.14159265358979) }

function write_mask(cell,    y, i, x) {
    zeros = sprintf("%" width "s", ""); gsub(/ /, "0", zeros)
    print width, height > mask
    ones = sprintf("%" width "s", ""); gsub(/ /, "1", ones)
    for (y = i = 0; y < height; y++) {
        for (x = 0; i < runs && row[i] == y; i++) if (root(i) == cell) {
            printf "%s%s", substr(zeros, 1, first[i] - x), substr(ones, 1, end[i] - first[i]) > mask
            x = end[i]
        }
        printf "%s", substr(zeros, 1, width - x) > mask
    }
    close(mask)
}

function row_of(name, format, value, unit) { printf "%s," format ",%s\n", name, value, unit > csv }

END {
    if (failed) exit 1
    if (!in_pixels) fail("not a binary PGM: no header")
    if (n != size) fail("the image says " width " x " height " pixels and has " n)
    threshold = otsu()
    find_runs()
    for (i = 0; i < runs; i++) { area[root(i)] += end[i] - first[i]; bright += end[i] - first[i] }
    cell = root(0)
    for (label in area) { objects++; if (area[label] > area[cell]) cell = label }

    left = width; top = height
    for (i = 0; i < runs; i++) if (root(i) == cell) {
        sum_x += (end[i] - first[i]) * (first[i] + end[i] - 1) / 2; sum_y += (end[i] - first[i]) * row[i]
        if (first[i] < left) left = first[i]
        if (end[i] - 1 > right) right = end[i] - 1
        if (row[i] < top) top = row[i]
        if (row[i] > bottom) bottom = row[i]
    }
    write_mask(cell)

    print "quantity,value,unit" > csv
    row_of("width", "%d", width, "px"); row_of("height", "%d", height, "px")
    row_of("otsu_threshold", "%d", threshold, "grey value")
    row_of("pixels_above_threshold", "%d", bright, "px")
    row_of("area_above_threshold", "%.1f", bright * scale * scale, "um^2")
    row_of("diameter_above_threshold", "%.2f", diameter(bright * scale * scale), "um")
    row_of("objects", "%d", objects, "count")
    row_of("cell_pixels", "%d", area[cell], "px")
    row_of("cell_area", "%.1f", area[cell] * scale * scale, "um^2")
    row_of("cell_diameter", "%.2f", diameter(area[cell] * scale * scale), "um")
    row_of("cell_centroid_x", "%.1f", sum_x / area[cell], "px"); row_of("cell_centroid_y", "%.1f", sum_y / area[cell], "px")
    row_of("cell_left", "%d", left, "px"); row_of("cell_top", "%d", top, "px")
    row_of("cell_right", "%d", right, "px"); row_of("cell_bottom", "%d", bottom, "px")
    say("threshold " threshold ", sets of bright pixels: " objects ", the largest has " area[cell] " pixels")
}
'
{
    IFS= read -r size
    printf 'P5\n%s\n255\n' "$size"
    tr 01 '\000\377'
} < "$out/mask.txt" > "$out/mask.pgm"
cat "$out/measurements.csv"
