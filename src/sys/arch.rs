//! What depends on the processor when another task's threads are handled from outside: the names of
//! registers, and how a system call is made with them. A port adds its own `imp` and nothing else.

/// Whether there is an implementation for this processor.
pub const SUPPORTED: bool = cfg!(target_arch = "x86_64");

pub use imp::*;

#[cfg(target_arch = "x86_64")]
mod imp {
    use std::io;

    use nix::unistd::Pid;

    /// The general registers as `PTRACE_GETREGSET` hands them out for `NT_PRSTATUS`.
    pub type Registers = libc::user_regs_struct;
    /// The register set that holds everything else: `NT_X86_XSTATE`, linux/elf.h.
    pub const EXTENDED: usize = 0x202;
    /// No processor has more of it (with AMX it is 11 KiB).
    pub const EXTENDED_MAX: usize = 16 << 10;
    /// The `syscall` instruction.
    pub const INSTRUCTION: &[u8] = &[0x0f, 0x05];

    /// Registers that make a call when the instruction at `at` runs.
    pub fn call(saved: &Registers, at: u64, number: i64, arguments: [u64; 6]) -> Registers {
        let mut registers = *saved;
        registers.rip = at;
        registers.rax = number as u64;
        [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] =
            arguments;
        // Not in a system call: the kernel must not restart the one that was interrupted now.
        registers.orig_rax = u64::MAX;
        registers
    }

    /// Returns where the thread is.
    pub fn position(registers: &Registers) -> u64 {
        registers.rip
    }

    /// Returns where its stack is.
    pub fn stack(registers: &Registers) -> u64 {
        registers.rsp
    }

    /// Tells whether the thread runs programs of 64 bits: others have other calls.
    pub fn native(registers: &Registers) -> bool {
        // __USER_CS of asm/segment.h
        registers.cs == 0x33
    }

    /// Returns what the call returned.
    pub fn result(registers: &Registers) -> i64 {
        registers.rax as i64
    }

    /// The number of the call that the thread was in when it was stopped, all 64 bits of it, and its
    /// arguments. None for one that was in its program.
    pub fn in_call(registers: &Registers) -> Option<(u64, [u64; 6])> {
        let r = registers;
        (r.orig_rax as i64 >= 0).then_some((r.orig_rax, [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9]))
    }

    /// The number and arguments of the call that it makes next, if what comes next is [`INSTRUCTION`].
    pub fn upcoming(registers: &Registers) -> (u64, [u64; 6]) {
        let r = registers;
        (r.rax, [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9])
    }

    /// Gives that call another argument.
    pub fn set_argument(registers: &mut Registers, at: usize, value: u64) {
        let r = registers;
        let all = [&mut r.rdi, &mut r.rsi, &mut r.rdx, &mut r.r10, &mut r.r8, &mut r.r9];
        if let Some(argument) = all.into_iter().nth(at) {
            *argument = value;
        }
    }

    /// Has the kernel begin the call anew that it was in, by this number, or end it with `EINTR` if a signal
    /// handler is to run: `ERESTARTNOHAND`.
    pub fn again(registers: &mut Registers, number: u64) {
        registers.orig_rax = number;
        registers.rax = -514i64 as u64;
    }

    /// Has it make a call where it has made that which it was in.
    pub fn enter(registers: &mut Registers, number: u64) {
        registers.rip = registers.rip.wrapping_sub(INSTRUCTION.len() as u64);
        registers.rax = number;
        registers.orig_rax = u64::MAX;
    }

    /// Has it make another call than the [`upcoming`] one.
    pub fn enter_here(registers: &mut Registers, number: u64) {
        registers.rax = number;
        registers.orig_rax = u64::MAX;
    }

    /// Has the call that it was in have this result, which the kernel may replace.
    pub fn set_result(registers: &mut Registers, result: i64) {
        registers.rax = result as u64;
    }

    /// Has that call be over, with this result.
    pub fn returned(registers: &mut Registers, result: i64) {
        registers.rax = result as u64;
        registers.orig_rax = u64::MAX;
    }

    /// Takes away the breakpoints that a tracer has set in the debug registers: they outlive it.
    ///
    /// # Errors
    /// When the thread is gone.
    pub fn clear_breakpoints(tid: Pid) -> io::Result<()> {
        const CONTROL: usize = 7;
        let at = std::mem::offset_of!(libc::user, u_debugreg) + CONTROL * size_of::<u64>();
        // SAFETY: the address is an offset into the tracee's user area and the datum a number.
        let r = unsafe { libc::ptrace(libc::PTRACE_POKEUSER, tid.as_raw(), at, 0) };
        if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Enough to compile; nothing here is called where [`SUPPORTED`] is false.
#[cfg(not(target_arch = "x86_64"))]
mod imp {
    use std::io;

    use nix::unistd::Pid;

    /// See x86-64.
    pub type Registers = [u8; 0];
    /// See x86-64.
    pub const EXTENDED: usize = 0;
    /// See x86-64.
    pub const EXTENDED_MAX: usize = 0;
    /// See x86-64.
    pub const INSTRUCTION: &[u8] = &[0];

    /// See x86-64.
    pub fn call(saved: &Registers, _: u64, _: i64, _: [u64; 6]) -> Registers {
        *saved
    }

    /// See x86-64.
    pub fn position(_: &Registers) -> u64 {
        0
    }

    /// See x86-64.
    pub fn stack(_: &Registers) -> u64 {
        0
    }

    /// See x86-64.
    pub fn native(_: &Registers) -> bool {
        false
    }

    /// See x86-64.
    pub fn result(_: &Registers) -> i64 {
        -i64::from(libc::ENOSYS)
    }

    /// See x86-64. arm64 has the number in x8, which a program sees again: nothing may be added to it.
    pub fn in_call(_: &Registers) -> Option<(u64, [u64; 6])> {
        None
    }

    /// See x86-64.
    pub fn upcoming(_: &Registers) -> (u64, [u64; 6]) {
        (0, [0; 6])
    }

    /// See x86-64.
    pub fn set_argument(_: &mut Registers, _: usize, _: u64) {}

    /// See x86-64.
    pub fn again(_: &mut Registers, _: u64) {}

    /// See x86-64.
    pub fn enter(_: &mut Registers, _: u64) {}

    /// See x86-64.
    pub fn enter_here(_: &mut Registers, _: u64) {}

    /// See x86-64.
    pub fn set_result(_: &mut Registers, _: i64) {}

    /// See x86-64.
    pub fn returned(_: &mut Registers, _: i64) {}

    /// See x86-64.
    ///
    /// # Errors
    /// Always.
    pub fn clear_breakpoints(_: Pid) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
