# Everything that there is to compare of a tree, one line a file; directories named in the
# arguments are left out.
import hashlib, os, stat, sys

root, out, links = sys.argv[1].encode(), [], {}
skipped = {os.path.join(root, a.encode()) for a in sys.argv[2:]}

def look(path):
    m = os.lstat(path)
    is_dir = stat.S_ISDIR(m.st_mode)
    what = [repr(os.path.relpath(path, root)), oct(m.st_mode), m.st_uid, m.st_gid, m.st_rdev]
    if path not in skipped:
        what.append(m.st_mtime_ns)
    what.append(sorted((n, os.getxattr(path, n, follow_symlinks=False)) for n in os.listxattr(path, follow_symlinks=False)))
    if not is_dir:
        what += [m.st_nlink, links.setdefault(m.st_ino, len(links)), m.st_size]
    if stat.S_ISREG(m.st_mode):
        what.append(hashlib.sha256(open(path, 'rb').read()).hexdigest())
        what.append('sparse' if m.st_size > 1 << 20 and m.st_blocks * 512 < m.st_size / 2 else 'full')
    if stat.S_ISLNK(m.st_mode):
        what.append(os.readlink(path))
    out.append(' '.join(map(str, what)))
    if is_dir and path not in skipped:
        for name in sorted(os.listdir(path)):
            look(os.path.join(path, name))

look(root)
print('\n'.join(out))
