//! Checks every field of a request, so that one answer names all bad fields.

use std::{fmt::Display, ops::RangeInclusive};

use tonic_types::FieldViolation;
use uuid::Uuid;

use crate::page::{PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX};

/// Collects the bad fields of a request. Each check names its field by path (`items[2].sku`), and none stops the
/// others. Only the path of a bad field is written out, since most are good.
#[derive(Debug, Default)]
pub struct Fields {
    violations: Vec<FieldViolation>,
}

impl Fields {
    /// Records a bad field, with a description of a good one.
    pub fn refuse(&mut self, field: impl Display, description: impl Into<String>) {
        self.violations.push(FieldViolation::new(field.to_string(), description));
    }

    /// Checks a name: 1 to 64 characters of `A-Z a-z 0-9 . _ -`, which databases, logs and shells leave unchanged.
    pub fn name(&mut self, field: impl Display, text: &str) {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if !(1..=64).contains(&text.len()) || !text.bytes().all(allowed) {
            self.refuse(field, "must be 1 to 64 characters of A-Z a-z 0-9 . _ -");
        }
    }

    /// Checks that a number is in a range.
    pub fn number(&mut self, field: impl Display, number: impl Into<i64>, allowed: RangeInclusive<i64>) {
        let number = number.into();
        if !allowed.contains(&number) {
            let (least, most) = allowed.into_inner();
            self.refuse(field, format!("must be from {least} to {most}, and is {number}"));
        }
    }

    /// Checks the size of a page, and returns the size to use: the default for 0, and at most the largest page.
    pub fn page_size(&mut self, field: impl Display, asked: i32) -> u16 {
        match asked {
            ..0 => {
                self.refuse(field, format!("must be from 0 to {PAGE_SIZE_MAX}, and is {asked}"));
                PAGE_SIZE_DEFAULT
            }
            0 => PAGE_SIZE_DEFAULT,
            _ => u16::try_from(asked).unwrap_or(PAGE_SIZE_MAX).min(PAGE_SIZE_MAX),
        }
    }

    /// Parses a UUID. For a bad one it returns the nil UUID.
    pub fn uuid(&mut self, field: impl Display, text: &str) -> Uuid {
        Uuid::try_parse(text).unwrap_or_else(|_| {
            self.refuse(field, "must be a UUID, such as 0192f0c1-2345-7abc-8def-0123456789ab");
            Uuid::nil()
        })
    }

    /// Parses a UUID that the caller chooses, and refuses the nil UUID. That is what a client sends that forgot to choose
    /// one, and two such calls would pass for one.
    pub fn chosen_uuid(&mut self, field: impl Display, text: &str) -> Uuid {
        match Uuid::try_parse(text) {
            Ok(id) if id.is_nil() => {
                self.refuse(field, "must be a UUID that you choose, and is the nil UUID");
                id
            }
            _ => self.uuid(field, text),
        }
    }

    /// Returns `value` if no field is bad.
    ///
    /// # Errors
    /// All bad fields, in the order of the checks.
    pub fn finish<T>(self, value: T) -> Result<T, Vec<FieldViolation>> {
        if self.violations.is_empty() { Ok(value) } else { Err(self.violations) }
    }
}
