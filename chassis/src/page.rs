//! Pages of a list, as AIP-158 describes them.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

/// The largest page; asking for more answers this many.
pub(crate) const PAGE_SIZE_MAX: u16 = 500;
pub(crate) const PAGE_SIZE_DEFAULT: u16 = 50;

/// A token that continues the list named `list` after `last`. Neither may hold a newline.
pub fn encode_page_token(list: &str, last: &str) -> String {
    URL_SAFE_NO_PAD.encode(format!("{list}\n{last}"))
}

/// Where a token continues the list named `list`; `None` when the token was not made by [`encode_page_token`] for that
/// list. It opens nothing to its holder that asking for the list does not.
pub fn decode_page_token(list: &str, token: &str) -> Option<String> {
    let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
    let (of_list, last) = text.split_once('\n')?;
    (of_list == list).then(|| last.to_owned())
}

#[cfg(test)]
mod tests {
    use super::{decode_page_token, encode_page_token};

    #[test]
    fn a_token_continues_its_own_list_only() {
        let token = encode_page_token("orders of ann", "17");
        assert_eq!(decode_page_token("orders of ann", &token).as_deref(), Some("17"));
        assert_eq!(decode_page_token("orders of bob", &token), None);
        assert_eq!(decode_page_token("orders of ann", "not a token"), None);
    }
}
