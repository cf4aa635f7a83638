//! The kernel's tracepoints, heard through perf_event_open(2): nothing is left of them when the
//! process ends, however it ends.

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{fs, io};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// Where tracefs is, if somebody has mounted it.
const TRACEFS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
const ONLINE: &str = "/sys/devices/system/cpu/online";

/// `PERF_TYPE_TRACEPOINT`, `PERF_SAMPLE_RAW`, `PERF_FLAG_FD_CLOEXEC`, `PERF_ATTR_SIZE_VER0`, and the
/// bits `disabled` and `watermark` of struct perf_event_attr.
const TYPE_TRACEPOINT: u64 = 2;
const SAMPLE_RAW: u64 = 1 << 10;
const FD_CLOEXEC: u64 = 1 << 3;
const ATTR_SIZE: u64 = 64;
const DISABLED: u64 = 1;
const WATERMARK: u64 = 1 << 14;
/// `PERF_EVENT_IOC_ENABLE`, `_SET_OUTPUT`, `_SET_FILTER`.
const ENABLE: libc::c_ulong = 0x2400;
const SET_OUTPUT: libc::c_ulong = 0x2405;
const SET_FILTER: libc::c_ulong = 0x4008_2406;
/// `PERF_RECORD_SAMPLE`.
const RECORD_SAMPLE: u32 = 9;
/// `data_head` and `data_tail` in struct perf_event_mmap_page.
const HEAD: usize = 1024;
const TAIL: usize = 1032;
/// struct perf_event_header.
const RECORD_HEADER: usize = 8;

/// What can be heard, and which of its fields are wanted.
#[derive(Clone, Debug)]
pub struct Point {
    id: u64,
    /// Offset and length of each.
    fields: Vec<(usize, usize)>,
}

/// Finds these: of each the system, the name, and the fields. tracefs is mounted for a moment where
/// nobody has done so.
///
/// # Errors
/// ENOENT where the kernel does not have one of them, or a field; ENODEV without tracefs.
pub fn find(wanted: &[(&str, &str, &[&str])]) -> io::Result<Vec<Point>> {
    let all = |tracefs: &Path| wanted.iter().map(|one| find_one(tracefs, one)).collect();
    if let Some(there) = TRACEFS.iter().map(Path::new).find(|p| p.join("events").exists()) {
        return all(there);
    }
    let place = tempfile::tempdir_in("/run")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    mount(Some("ferry"), place.path(), Some("tracefs"), flags, None::<&str>)?;
    let found = all(place.path());
    umount2(place.path(), MntFlags::MNT_DETACH)?;
    found
}

fn find_one(tracefs: &Path, (system, name, fields): &(&str, &str, &[&str])) -> io::Result<Point> {
    let here = tracefs.join("events").join(system).join(name);
    let id = fs::read_to_string(here.join("id"))?.trim().parse();
    let id = id.map_err(|_| io::Error::from(Errno::EIO))?;
    let format = fs::read_to_string(here.join("format"))?;
    let fields = fields.iter().map(|field| find_field(&format, field));
    let fields: Option<_> = fields.collect();
    Ok(Point { id, fields: fields.ok_or_else(|| io::Error::from(Errno::ENOENT))? })
}

/// A line is `field:unsigned long index; offset:48; size:8; signed:0;`, with tabs.
fn find_field(format: &str, field: &str) -> Option<(usize, usize)> {
    format.lines().find_map(|line| {
        let mut parts = line.trim().split(';').map(str::trim);
        let declared = parts.next()?.strip_prefix("field:")?;
        if declared.split_ascii_whitespace().last()? != field {
            return None;
        }
        let offset = parts.next()?.strip_prefix("offset:")?.parse().ok()?;
        let length = parts.next()?.strip_prefix("size:")?.parse().ok()?;
        matches!(length, 1 | 2 | 4 | 8).then_some((offset, length))
    })
}

/// What all processors say of some points.
#[derive(Debug)]
pub struct Tracing {
    points: Vec<Point>,
    rings: Vec<TraceRing>,
    /// All of them; the first of a processor has its ring.
    events: Vec<OwnedFd>,
    /// One that comes later is not heard.
    online: String,
}

/// What was heard.
#[derive(Debug, PartialEq, Eq)]
pub enum Traced<'a> {
    /// Which of the points, and its fields.
    Hit(usize, &'a [u64]),
    /// There was more than fits.
    Lost,
}

impl Tracing {
    /// Opens these, and hears nothing of them yet; so many bytes for each processor, a power of two
    /// of pages.
    ///
    /// # Errors
    /// As perf_event_open(2): EACCES, ENOSYS where it is not allowed or not there.
    pub fn open(points: Vec<Point>, room: usize) -> io::Result<Tracing> {
        let online = fs::read_to_string(ONLINE)?;
        let (mut rings, mut events) = (Vec::new(), Vec::new());
        for cpu in processors(&online) {
            let mut first: Option<i32> = None;
            for point in &points {
                let event = open(point.id, cpu, room / 2)?;
                match first {
                    None => {
                        first = Some(event.as_raw_fd());
                        rings.push(TraceRing::map(&event, room)?);
                    }
                    Some(first) => control(&event, SET_OUTPUT, first as libc::c_ulong)?,
                }
                events.push(event);
            }
        }
        Ok(Tracing { points, rings, events, online })
    }

    /// From now on hears of what this filter lets through: `ino == 12 || ino == 13`.
    ///
    /// # Errors
    /// When the kernel does not take the filter.
    pub fn only(&self, filter: &str) -> io::Result<()> {
        let filter = std::ffi::CString::new(filter)?;
        for event in &self.events {
            control(event, SET_FILTER, filter.as_ptr() as libc::c_ulong)?;
            control(event, ENABLE, 0)?;
        }
        Ok(())
    }

    /// Everything that has happened and was not heard yet.
    pub fn read(&mut self, hear: &mut dyn FnMut(Traced)) {
        if fs::read_to_string(ONLINE).ok().as_deref() != Some(&self.online) {
            hear(Traced::Lost);
        }
        let mut values = Vec::new();

        for ring in &mut self.rings {
            ring.read(&mut |kind, record| {
                if kind != RECORD_SAMPLE {
                    return hear(Traced::Lost);
                }

                // The raw data have their length before them, and begin with the point's number.
                let raw = record.get(4..).unwrap_or_default();
                let id = number(raw, 0, 2);
                let Some(which) = self.points.iter().position(|p| Some(p.id) == id) else {
                    return hear(Traced::Lost);
                };

                values.clear();
                let fields = self.points[which].fields.iter();
                values.extend(fields.map_while(|(at, length)| number(raw, *at, *length)));
                if values.len() == self.points[which].fields.len() {
                    hear(Traced::Hit(which, &values))
                } else {
                    hear(Traced::Lost)
                }
            });
        }
    }

    /// Readable when one of the rings is half full.
    pub fn wakers(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.events.iter().step_by(self.points.len()).map(AsFd::as_fd)
    }
}

fn number(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(length)?)?;
    let mut word = [0; 8];
    // Little-endian, as all that Ferry runs on.
    word[..length].copy_from_slice(bytes);
    Some(u64::from_le_bytes(word))
}

/// `0-3,5`
fn processors(online: &str) -> Vec<i32> {
    let ranges = online.trim().split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.parse::<i32>().ok()?..=last.parse().ok()?)
    });
    ranges.flatten().collect()
}

fn open(point: u64, cpu: i32, watermark: usize) -> io::Result<OwnedFd> {
    // type and size, config, sample_period, sample_type, read_format, flags, wakeup_watermark, -
    let flags = DISABLED | WATERMARK;
    let attr: [u64; 8] =
        [TYPE_TRACEPOINT | ATTR_SIZE << 32, point, 1, SAMPLE_RAW, 0, flags, watermark as u64, 0];
    // SAFETY: the structure has the size that it says.
    let fd =
        unsafe { libc::syscall(libc::SYS_perf_event_open, attr.as_ptr(), -1, cpu, -1, FD_CLOEXEC) };
    let fd = Errno::result(fd)?;
    // SAFETY: it is new, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn control(event: &OwnedFd, what: libc::c_ulong, argument: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the argument is what the request wants: a number, or a string that lives longer.
    let result = unsafe { libc::ioctl(event.as_raw_fd(), what as _, argument) };
    Errno::result(result)?;
    Ok(())
}

/// Records as the kernel writes them, behind a page that says where it is. perf_event_open(2)
#[derive(Debug)]
struct TraceRing {
    base: NonNull<libc::c_void>,
    page: usize,
    room: usize,
    record: Vec<u8>,
}

// SAFETY: the mapping belongs to it alone, and any thread may read it.
unsafe impl Send for TraceRing {}

impl TraceRing {
    fn map(event: &OwnedFd, room: usize) -> io::Result<TraceRing> {
        let page = crate::sys::memory::PAGE;
        let length = NonZeroUsize::new(page + room).ok_or(Errno::EINVAL)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, wherever the kernel finds room.
        let base = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, event, 0)? };
        Ok(TraceRing { base, page, room, record: Vec::new() })
    }

    fn position(&self, at: usize) -> &AtomicU64 {
        // SAFETY: both words are in the first page of the mapping, aligned, and live as long as it.
        unsafe { self.base.byte_add(at).cast().as_ref() }
    }

    fn read(&mut self, hear: &mut dyn FnMut(u32, &[u8])) {
        // What was written before the head was moved can be read after.
        let head = self.position(HEAD).load(Ordering::Acquire);
        let mut tail = self.position(TAIL).load(Ordering::Relaxed);
        let mut header = [0; RECORD_HEADER];
        while tail < head {
            self.copy(tail, &mut header);
            let kind = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]);
            let length = usize::from(u16::from_ne_bytes([header[6], header[7]]));
            let mut record = std::mem::take(&mut self.record);
            record.resize(length.saturating_sub(RECORD_HEADER), 0);
            self.copy(tail + RECORD_HEADER as u64, &mut record);
            hear(kind, &record);
            self.record = record;
            tail += length.max(RECORD_HEADER) as u64;
        }
        self.position(TAIL).store(head, Ordering::Release);
    }

    fn copy(&self, from: u64, to: &mut [u8]) {
        let at = (from % self.room as u64) as usize;
        let first = to.len().min(self.room - at);
        let data = self.base.cast::<u8>();
        // SAFETY: both parts are inside of the data pages, and the kernel writes there no more until
        // the tail has moved.
        unsafe {
            let data = data.add(self.page);
            data.add(at).copy_to_nonoverlapping(NonNull::from(&mut *to).cast(), first);
            data.copy_to_nonoverlapping(NonNull::from(&mut to[first..]).cast(), to.len() - first);
        }
    }
}

impl Drop for TraceRing {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference into it any more.
        let _ = unsafe { munmap(self.base, self.page + self.room) };
    }
}
