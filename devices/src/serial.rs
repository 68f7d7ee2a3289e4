//! A 16550 serial port: the console that works from the guest's first instruction on.

use std::convert::Infallible;
use std::io::Write;
use std::sync::Arc;

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Uart};

use crate::bus::BusDevice;
use crate::interrupt::IrqLine;

/// A serial port with an output and no input.
pub struct Serial {
    uart: Uart<Line, NoEvents, Box<dyn Write + Send>>,
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
        Serial { uart: Uart::new(Line(irq), output) }
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
    use std::io::{self, Read};
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

        assert!(line.event().read().is_ok());
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
}
