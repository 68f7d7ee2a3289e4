//! A 16550 serial port: the console that works from the guest's first instruction on.

use std::convert::Infallible;
use std::io::{self, Write};
use std::mem;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Uart, SerialState};

use crate::bus::BusDevice;
use crate::interrupt::IrqLine;

/// A serial port with an output and no input.
pub struct Serial {
    uart: Uart<Line, NoEvents, Box<dyn Write + Send>>,
    irq: Arc<IrqLine>,
}

/// The registers of a serial port, and what it has received and nobody has read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    received: Vec<u8>,
}

struct Line(Arc<IrqLine>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.raise();
        Ok(())
    }
}

impl Serial {
    /// A port that raises `irq` and writes each byte to `output`, which must not block. What the
    /// output does not take is lost, as it is on a wire with nobody at its other end.
    pub fn new(irq: Arc<IrqLine>, output: Box<dyn Write + Send>) -> Self {
        Serial { uart: Uart::new(Line(irq.clone()), output), irq }
    }

    /// Where the port stands.
    pub fn save(&self) -> State {
        let state = self.uart.state();
        State {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
        }
    }

    /// Goes on from `state`, in the place of the port that was saved. Fails if more was received than
    /// a port holds.
    pub fn restore(&mut self, state: &State) -> io::Result<()> {
        let [baud_divisor_low, baud_divisor_high] = state.divisor;
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received.clone(),
        };
        let line = || Line(self.irq.clone());
        let idle = Uart::new(line(), Box::new(io::sink()) as Box<dyn Write + Send>);
        let output = mem::replace(&mut self.uart, idle).into_writer();
        self.uart = Uart::from_state(&state, line(), NoEvents, output)
            .map_err(|_| io::ErrorKind::InvalidData)?;
        Ok(())
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let ([register], Ok(offset)) = (data, u8::try_from(offset)) {
            *register = self.uart.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (&[value], Ok(offset)) = (data, u8::try_from(offset)) {
            // A byte that is lost has no way to be reported to a serial driver.
            let _ = self.uart.write(offset, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    struct Broken;

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn line() -> Arc<IrqLine> {
        Arc::new(IrqLine::new().unwrap())
    }

    #[test]
    fn a_byte_sent_reaches_the_output() {
        let (mut sight, output) = UnixStream::pair().unwrap();
        let mut serial = Serial::new(line(), Box::new(output));

        serial.write(0, b"x");

        let mut seen = [0];
        sight.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"x");
    }

    #[test]
    fn a_driver_that_asks_is_interrupted_when_it_may_send() {
        let line = line();
        let mut serial = Serial::new(line.clone(), Box::new(io::sink()));

        serial.write(1, &[0x02]);

        assert!(line.event().unwrap().read().is_ok());
    }

    #[test]
    fn a_broken_output_does_not_stop_the_guest() {
        let mut serial = Serial::new(line(), Box::new(Broken));

        serial.write(0, b"x");

        let mut status = [0];
        serial.read(5, &mut status);
        assert_eq!(status, [0x60]);
    }

    #[test]
    fn wide_accesses_read_as_zero() {
        let mut data = [0xff; 2];
        Serial::new(line(), Box::new(io::sink())).read(5, &mut data);
        assert_eq!(data, [0, 0]);
    }

    #[test]
    fn a_port_built_anew_has_the_registers_of_the_old_one() {
        let mut old = Serial::new(line(), Box::new(io::sink()));
        old.write(3, &[0x80]);
        old.write(0, &[0x0c]);
        old.write(3, &[0x03]);
        old.write(7, &[0x5a]);
        let state = postcard::to_stdvec(&old.save()).unwrap();

        let (mut sight, output) = UnixStream::pair().unwrap();
        let mut new = Serial::new(line(), Box::new(output));
        new.restore(&postcard::from_bytes(&state).unwrap()).unwrap();

        let read = |serial: &mut Serial, register| {
            let mut value = [0];
            serial.read(register, &mut value);
            value[0]
        };
        assert_eq!([3, 7].map(|register| read(&mut new, register)), [0x03, 0x5a]);
        assert_eq!(new.save(), old.save());
        new.write(0, b"x");
        let mut seen = [0];
        sight.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"x");
    }
}
