//! Compiles the system call filters of the architecture the machine is built for.
//!
//! An architecture without a file in `seccomp/` gets no filters at all, which the program can tell
//! from filters that allow everything.

use std::env;
use std::error::Error;
use std::fmt::Write;
use std::fs::{self, File};
use std::path::Path;

use seccompiler::{BpfMap, TargetArch, compile_from_json};

/// Kinds of threads, as the JSON files and the fields of `Filters` call them.
const KINDS: [&str; 4] = ["vcpu", "vmm", "io", "main"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=seccomp");
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let source = format!("seccomp/{arch}.json");
    let filters = if Path::new(&source).exists() {
        let arch = TargetArch::try_from(arch.as_str())?;
        let compiled = compile_from_json(File::open(&source)?, arch)
            .map_err(|error| format!("{source}: {error}"))?;
        format!("Some({})", literal(compiled).map_err(|error| format!("{source}: {error}"))?)
    } else {
        "None".to_owned()
    };
    let code = format!("const FILTERS: Option<Filters> = {filters};\n");
    fs::write(Path::new(&env::var("OUT_DIR")?).join("filters.rs"), code)?;
    Ok(())
}

/// The filters as an expression of Rust.
fn literal(mut compiled: BpfMap) -> Result<String, Box<dyn Error>> {
    let mut code = "Filters {".to_owned();
    for kind in KINDS {
        let program = compiled.remove(kind).ok_or(format!("no filter for {kind}"))?;
        write!(code, "{kind}: &[")?;
        for step in program {
            let (operation, if_true, if_false) = (step.code, step.jt, step.jf);
            write!(
                code,
                "sock_filter {{ code: {operation}, jt: {if_true}, jf: {if_false}, k: {} }},",
                step.k
            )?;
        }
        code.push_str("],");
    }
    match compiled.into_keys().next() {
        Some(kind) => Err(format!("no thread is called {kind}").into()),
        None => Ok(code + "}"),
    }
}
