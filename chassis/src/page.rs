//! Pages of a list, as AIP-158 describes them.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

/// The largest page. A request for more gets this many entries.
pub(crate) const PAGE_SIZE_MAX: u16 = 500;
pub(crate) const PAGE_SIZE_DEFAULT: u16 = 50;

/// Makes the token that continues the list named `list` after the entry `last`. Neither may contain a newline.
pub fn encode_page_token(list: &str, last: &str) -> String {
    URL_SAFE_NO_PAD.encode(format!("{list}\n{last}"))
}

/// Reads the entry after which a token continues the list named `list`. Returns `None` if [`encode_page_token`] did not
/// make the token for that list.
///
/// Tokens are neither signed nor secret: a made-up token shows nothing that a plain request for the list would not.
pub fn decode_page_token(list: &str, token: &str) -> Option<String> {
    let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
    let (of_list, last) = text.split_once('\n')?;
    (of_list == list).then(|| last.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Any text, text in the alphabet of tokens, a list's name followed by any bytes, and tokens with a changed end.
    fn token() -> impl Strategy<Value = String> {
        let named = prop::collection::vec(any::<u8>(), 0..9)
            .prop_map(|bytes| URL_SAFE_NO_PAD.encode([b"orders\n", &bytes[..]].concat()));
        let nearly = ("[a-z]{0,9}", "[A-Za-z0-9_=-]{0,2}").prop_map(|(last, end)| {
            let token = encode_page_token("orders", &last);
            token[..token.len() - 1].to_owned() + &end
        });
        prop_oneof![any::<String>(), "[A-Za-z0-9_-]{0,40}", named, nearly]
    }

    proptest! {
        #[test]
        fn a_token_returns_the_last_entry_for_its_own_list_and_for_no_other(list in "[^\n]*", other in "[^\n]*", last in "[^\n]*") {
            let token = encode_page_token(&list, &last);
            prop_assert_eq!(decode_page_token(&list, &token), Some(last));
            prop_assert!(list == other || decode_page_token(&other, &token).is_none());
        }

        #[test]
        fn a_made_up_token_is_accepted_only_if_it_is_the_encoding_of_its_entry(token in token()) {
            let last = decode_page_token("orders", &token);
            prop_assert!(last.is_none_or(|last| encode_page_token("orders", &last) == token));
        }
    }

    #[test]
    fn a_token_continues_its_own_list_only() {
        let token = encode_page_token("orders of ann", "17");
        assert_eq!(decode_page_token("orders of ann", &token).as_deref(), Some("17"));
        assert_eq!(decode_page_token("orders of bob", &token), None);
        assert_eq!(decode_page_token("orders of ann", "not a token"), None);
    }
}
