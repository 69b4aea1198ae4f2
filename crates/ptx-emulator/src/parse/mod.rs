//! PTX text to [`ast::Ptx`].

pub(crate) mod ast;
mod lexer;

use crate::LoadError;
use ast::{Func, Instr, Loc, Operand, Ptx, Space, Stmt, Var};
use lexer::{Kind, Token};

pub(crate) fn parse(text: &str) -> Result<Ptx, LoadError> {
    let mut parser = Parser { tokens: lexer::tokens(text)?, at: 0 };
    parser.module()
}

/// Bytes of a fundamental type (`.pred` counts as one).
pub(crate) fn type_size(name: &str) -> Option<usize> {
    Some(match name {
        ".pred" | ".b8" | ".u8" | ".s8" => 1,
        ".b16" | ".u16" | ".s16" | ".f16" | ".bf16" => 2,
        ".b32" | ".u32" | ".s32" | ".f32" | ".f16x2" | ".bf16x2" => 4,
        ".b64" | ".u64" | ".s64" | ".f64" => 8,
        ".b128" => 16,
        _ => return None,
    })
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
}

type Parsed<T> = Result<T, LoadError>;

impl Parser {
    fn line(&self) -> u32 {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(0, |t| t.line)
    }

    fn error<T>(&self, wanted: &str) -> Parsed<T> {
        let found = match self.tokens.get(self.at).map(|t| &t.kind) {
            Some(Kind::Word(w)) => format!("`{w}`"),
            Some(Kind::Text(t)) => format!("\"{t}\""),
            Some(Kind::Punct(c)) => format!("`{c}`"),
            None => "the end of the file".into(),
        };
        Err(LoadError::syntax(self.line(), &format!("wanted {wanted}, found {found}")))
    }

    fn peek_word(&self) -> Option<&str> {
        match self.tokens.get(self.at) {
            Some(Token { kind: Kind::Word(w), .. }) => Some(w),
            _ => None,
        }
    }

    fn peek_punct(&self, c: char) -> bool {
        matches!(self.tokens.get(self.at), Some(Token { kind: Kind::Punct(p), .. }) if *p == c)
    }

    fn eat(&mut self, c: char) -> bool {
        let hit = self.peek_punct(c);
        self.at += hit as usize;
        hit
    }

    fn eat_word(&mut self, word: &str) -> bool {
        let hit = self.peek_word() == Some(word);
        self.at += hit as usize;
        hit
    }

    fn expect(&mut self, c: char) -> Parsed<()> {
        if self.eat(c) { Ok(()) } else { self.error(&format!("`{c}`")) }
    }

    fn word(&mut self) -> Parsed<String> {
        match self.peek_word() {
            Some(w) => {
                let w = w.to_string();
                self.at += 1;
                Ok(w)
            }
            None => self.error("a word"),
        }
    }

    fn number(&mut self) -> Parsed<i128> {
        let line = self.line();
        match self.literal()? {
            Operand::Int(v) => Ok(v),
            _ => Err(LoadError::syntax(line, "wanted an integer")),
        }
    }

    fn text(&mut self) -> Parsed<String> {
        match self.tokens.get(self.at) {
            Some(Token { kind: Kind::Text(t), .. }) => {
                let t = t.clone();
                self.at += 1;
                Ok(t)
            }
            _ => self.error("a string"),
        }
    }

    fn module(&mut self) -> Parsed<Ptx> {
        let mut ptx = Ptx::default();
        let mut external = false;
        while self.at < self.tokens.len() {
            let line = self.line();
            match self.word()?.as_str() {
                ".version" | ".address_size" => drop(self.word()?),
                ".target" => {
                    ptx.target = self.word()?;
                    while self.eat(',') {
                        self.word()?;
                    }
                }
                ".file" => {
                    let number = self.number()? as u32;
                    ptx.files.push((number, self.text()?));
                    while self.eat(',') {
                        self.number()?;
                    }
                }
                ".extern" => external = true,
                ".visible" | ".weak" | ".common" => external = false,
                ".entry" => {
                    let func = self.function(true, line)?;
                    ptx.funcs.push(func);
                    external = false;
                }
                ".func" => {
                    let func = self.function(false, line)?;
                    ptx.funcs.push(func);
                    external = false;
                }
                ".section" => self.skip_section()?,
                ".pragma" => {
                    self.text()?;
                    self.expect(';')?;
                }
                ".alias" => return Err(LoadError::unsupported(line, ".alias")),
                word => match space(word) {
                    Some(space) => {
                        for mut var in self.variables(space)? {
                            var.external = external;
                            ptx.vars.push(var);
                        }
                        external = false;
                    }
                    None => return Err(LoadError::unsupported(line, word)),
                },
            }
        }
        Ok(ptx)
    }

    fn skip_section(&mut self) -> Parsed<()> {
        while !self.eat('{') {
            if self.at >= self.tokens.len() {
                return self.error("`{`");
            }
            self.at += 1;
        }
        while !self.eat('}') {
            if self.at >= self.tokens.len() {
                return self.error("`}`");
            }
            self.at += 1;
        }
        Ok(())
    }

    fn function(&mut self, entry: bool, line: u32) -> Parsed<Func> {
        let mut func = Func { entry, line, ..Func::default() };
        if self.peek_punct('(') {
            func.returns = self.params()?;
        }
        func.name = self.word()?;
        if self.peek_punct('(') {
            func.params = self.params()?;
        }
        loop {
            if self.eat(';') {
                return Ok(func);
            }
            if self.eat('{') {
                func.body = Some(self.body()?);
                return Ok(func);
            }
            let line = self.line();
            match self.word()?.as_str() {
                ".maxntid" => func.max_threads = Some(self.triple()?),
                ".reqntid" => func.required_threads = Some(self.triple()?),
                ".reqnctapercluster" => func.required_cluster = Some(self.triple()?),
                ".maxclusterrank" => drop(self.number()?),
                ".explicitcluster" | ".noreturn" => {}
                ".minnctapersm" | ".maxnctapersm" => func.min_blocks = Some(self.number()? as u32),
                ".maxnreg" => func.max_registers = Some(self.number()? as u32),
                ".pragma" => {
                    self.text()?;
                    self.expect(';')?;
                }
                other => return Err(LoadError::unsupported(line, other)),
            }
        }
    }

    fn triple(&mut self) -> Parsed<[u32; 3]> {
        let mut out = [1; 3];
        for (i, slot) in out.iter_mut().enumerate() {
            if i > 0 && !self.eat(',') {
                break;
            }
            *slot = self.number()? as u32;
        }
        Ok(out)
    }

    fn params(&mut self) -> Parsed<Vec<Var>> {
        self.expect('(')?;
        let mut out = Vec::new();
        while !self.eat(')') {
            let word = self.word()?;
            if word != ".param" && word != ".reg" {
                return Err(LoadError::unsupported(self.line(), &word));
            }
            out.push(self.variable(Space::Param, None)?);
            self.eat(',');
        }
        Ok(out)
    }

    fn variables(&mut self, space: Space) -> Parsed<Vec<Var>> {
        let first = self.variable(space, None)?;
        let (align, size) = (first.align, first.size);
        let mut out = vec![first];
        while self.eat(',') {
            out.push(self.variable(space, Some((align, size)))?);
        }
        self.expect(';')?;
        Ok(out)
    }

    /// After the state space: alignment, type, name, extents, initialiser.
    fn variable(&mut self, space: Space, like: Option<(usize, usize)>) -> Parsed<Var> {
        let line = self.line();
        let (mut align, mut elem, mut lanes) = (0, like.map_or(0, |l| l.1), 1);
        while self.peek_word().is_some_and(|w| w.starts_with('.')) {
            match self.word()?.as_str() {
                ".align" => align = self.number()? as usize,
                // `.param .u64 .ptr .global .align 4 name`: of the pointee, not of the parameter.
                ".ptr" => {
                    while self.peek_word().is_some_and(|w| w.starts_with('.')) {
                        if self.word()? == ".align" {
                            self.number()?;
                        }
                    }
                }
                ".v2" => lanes = 2,
                ".v4" => lanes = 4,
                ".attribute" => {
                    while !self.eat(')') {
                        self.at += 1;
                    }
                }
                ".unified" => {}
                ty => match type_size(ty) {
                    Some(size) => elem = size,
                    None => return Err(LoadError::unsupported(line, ty)),
                },
            }
        }
        let name = self.word()?;
        let mut count = lanes;
        while self.eat('[') {
            count *= if self.peek_punct(']') { 0 } else { self.number()? as usize };
            self.expect(']')?;
        }
        let mut var = Var {
            name,
            space,
            align: align.max(if like.is_some() { like.unwrap_or_default().0 } else { elem * lanes }).max(1),
            size: elem * count,
            external: false,
            init: Vec::new(),
            relocations: Vec::new(),
            line,
        };
        if self.eat('=') {
            self.initialiser(&mut var, elem)?;
            var.size = var.size.max(var.init.len());
        }
        Ok(var)
    }

    fn initialiser(&mut self, var: &mut Var, elem: usize) -> Parsed<()> {
        if self.eat('{') {
            while !self.eat('}') {
                self.initialiser(var, elem)?;
                self.eat(',');
            }
            return Ok(());
        }
        let is_name = self.peek_word().is_some_and(|w| !w.starts_with(|c: char| c.is_ascii_digit()));
        if is_name {
            let mut name = self.word()?;
            if name == "generic" {
                self.expect('(')?;
                name = self.word()?;
                self.expect(')')?;
            }
            let addend = if self.eat('+') { self.number()? as u64 } else { 0 };
            var.relocations.push((var.init.len(), name, addend));
            var.init.extend(vec![0; elem]);
            return Ok(());
        }
        let bits = match self.literal()? {
            Operand::Int(v) => v as u64,
            Operand::F32(v) => v as u64,
            Operand::F64(v) => v,
            _ => 0,
        };
        var.init.extend(&bits.to_le_bytes()[..elem]);
        Ok(())
    }

    fn body(&mut self) -> Parsed<Vec<Stmt>> {
        let (mut out, mut depth) = (Vec::new(), 0);
        loop {
            if self.eat('{') {
                depth += 1;
                out.push(Stmt::Open);
            } else if self.eat('}') {
                if depth == 0 {
                    return Ok(out);
                }
                depth -= 1;
                out.push(Stmt::Close);
            } else if self.eat(';') {
            } else {
                self.statement(&mut out)?;
            }
        }
    }

    fn statement(&mut self, out: &mut Vec<Stmt>) -> Parsed<()> {
        let line = self.line();
        if self.peek_punct('@') {
            out.push(Stmt::Instr(self.instruction()?));
            return Ok(());
        }
        let word = self.word()?;
        if self.eat(':') {
            if self.eat_word(".branchtargets") {
                let mut labels = vec![self.word()?];
                while self.eat(',') {
                    labels.push(self.word()?);
                }
                self.expect(';')?;
                out.push(Stmt::Targets(word, labels));
            } else if self.peek_word() == Some(".callprototype") {
                return Err(LoadError::unsupported(line, "indirect calls (.callprototype)"));
            } else {
                out.push(Stmt::Label(word));
            }
            return Ok(());
        }
        match word.as_str() {
            ".reg" => self.registers(out),
            ".loc" => {
                out.push(Stmt::Loc(self.location()?));
                Ok(())
            }
            ".pragma" => {
                let text = self.text()?;
                self.expect(';')?;
                if let Some(mask) = text.strip_prefix("used_bytes_mask ") {
                    let mask = mask.trim();
                    let value = match mask.strip_prefix("0x") {
                        Some(hex) => u64::from_str_radix(hex, 16),
                        None => mask.parse(),
                    };
                    out.push(Stmt::UsedBytes(value.map_err(|_| LoadError::unsupported(line, &text))?));
                }
                Ok(())
            }
            other => match space(other) {
                Some(space) => {
                    out.extend(self.variables(space)?.into_iter().map(Stmt::Var));
                    Ok(())
                }
                None if other.starts_with('.') => Err(LoadError::unsupported(line, other)),
                None => {
                    self.at -= 1;
                    out.push(Stmt::Instr(self.instruction()?));
                    Ok(())
                }
            },
        }
    }

    fn registers(&mut self, out: &mut Vec<Stmt>) -> Parsed<()> {
        let line = self.line();
        let ty = self.word()?;
        if type_size(&ty).is_none() {
            return Err(LoadError::unsupported(line, &format!(".reg {ty}")));
        }
        loop {
            let name = self.word()?;
            let count = if self.eat('<') {
                let n = self.number()? as u32;
                self.expect('>')?;
                Some(n)
            } else {
                None
            };
            out.push(Stmt::Reg(ty.clone(), name, count));
            if !self.eat(',') {
                break;
            }
        }
        self.expect(';')
    }

    fn location(&mut self) -> Parsed<Loc> {
        let mut loc = Loc { file: self.number()? as u32, line: self.number()? as u32, ..Loc::default() };
        self.number()?;
        while self.eat(',') {
            match self.word()?.as_str() {
                "function_name" => {
                    self.word()?;
                    if self.eat('+') {
                        self.number()?;
                    }
                }
                "inlined_at" => {
                    loc.at_file = self.number()? as u32;
                    loc.at_line = self.number()? as u32;
                    self.number()?;
                }
                other => return Err(LoadError::unsupported(self.line(), other)),
            }
        }
        Ok(loc)
    }

    fn instruction(&mut self) -> Parsed<Instr> {
        let guard = if self.eat('@') {
            let negate = self.eat('!');
            Some((self.word()?, negate))
        } else {
            None
        };
        let line = self.line();
        let opcode = self.word()?;
        let mut operands = Vec::new();
        while !self.eat(';') {
            operands.push(self.operand()?);
            if !self.peek_punct(';') {
                self.expect(',')?;
            }
        }
        Ok(Instr { line, guard, opcode, operands })
    }

    fn list(&mut self, close: char) -> Parsed<Vec<Operand>> {
        let mut out = Vec::new();
        while !self.eat(close) {
            out.push(self.operand()?);
            if !self.peek_punct(close) {
                self.expect(',')?;
            }
        }
        Ok(out)
    }

    fn operand(&mut self) -> Parsed<Operand> {
        if self.eat('{') {
            return Ok(Operand::Vector(self.list('}')?));
        }
        if self.eat('(') {
            return Ok(Operand::List(self.list(')')?));
        }
        if self.eat('!') {
            return Ok(Operand::Not(Box::new(self.operand()?)));
        }
        if self.eat('[') {
            return self.memory();
        }
        let first = self.atom()?;
        if self.eat('|') {
            return Ok(Operand::Pair(Box::new(first), Box::new(self.atom()?)));
        }
        if self.peek_punct('+') && matches!(first, Operand::Word(_)) {
            // `symbol + 4` as a value
            self.at += 1;
            let offset = self.number()? as i64;
            return Ok(Operand::Memory { base: Box::new(first), offset, coordinates: Vec::new() });
        }
        Ok(first)
    }

    fn memory(&mut self) -> Parsed<Operand> {
        let base = Box::new(self.atom()?);
        let mut offset = 0;
        while self.peek_punct('+') || self.peek_punct('-') {
            let negative = self.eat('-');
            if !negative {
                self.expect('+')?;
            }
            let n = self.number()? as i64;
            offset += if negative { -n } else { n };
        }
        let coordinates = if self.eat(',') {
            self.expect('{')?;
            self.list('}')?
        } else {
            Vec::new()
        };
        self.expect(']')?;
        Ok(Operand::Memory { base, offset, coordinates })
    }

    fn atom(&mut self) -> Parsed<Operand> {
        match self.peek_word() {
            Some(w) if !w.starts_with(|c: char| c.is_ascii_digit()) => Ok(Operand::Word(self.word()?)),
            _ => self.literal(),
        }
    }

    fn literal(&mut self) -> Parsed<Operand> {
        let negative = self.eat('-');
        let line = self.line();
        let word = self.word()?;
        let bad = || LoadError::syntax(line, &format!("`{word}` is not a number"));
        let lower = word.to_ascii_lowercase();
        if let Some(hex) = lower.strip_prefix("0f").filter(|h| h.len() == 8) {
            return Ok(Operand::F32(u32::from_str_radix(hex, 16).map_err(|_| bad())?));
        }
        if let Some(hex) = lower.strip_prefix("0d").filter(|h| h.len() == 16) {
            return Ok(Operand::F64(u64::from_str_radix(hex, 16).map_err(|_| bad())?));
        }
        let digits = lower.trim_end_matches('u');
        let value = if let Some(hex) = digits.strip_prefix("0x") {
            i128::from_str_radix(hex, 16)
        } else if let Some(bin) = digits.strip_prefix("0b") {
            i128::from_str_radix(bin, 2)
        } else if digits.len() > 1 && digits.starts_with('0') && !digits.contains('.') {
            i128::from_str_radix(&digits[1..], 8)
        } else if digits.contains('.') {
            let value: f64 = digits.parse().map_err(|_| bad())?;
            return Ok(Operand::F64(if negative { -value } else { value }.to_bits()));
        } else {
            digits.parse()
        };
        let value = value.map_err(|_| bad())?;
        Ok(Operand::Int(if negative { -value } else { value }))
    }
}

fn space(word: &str) -> Option<Space> {
    Some(match word {
        ".global" => Space::Global,
        ".const" => Space::Const,
        ".shared" | ".shared::cta" => Space::Shared,
        ".shared::cluster" => Space::Cluster,
        ".local" => Space::Local,
        ".param" | ".param::entry" | ".param::func" => Space::Param,
        _ => return None,
    })
}
