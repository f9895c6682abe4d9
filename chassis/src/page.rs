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
    use proptest::prelude::*;

    use super::*;

    /// Of no kind, of the right letters, of what may or may not be text after the name of a list, and nearly such a token.
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
        fn any_list_continues_where_it_was_left_and_no_other_does(list in "[^\n]*", other in "[^\n]*", last in "[^\n]*") {
            let token = encode_page_token(&list, &last);
            prop_assert_eq!(decode_page_token(&list, &token), Some(last));
            prop_assert!(list == other || decode_page_token(&other, &token).is_none());
        }

        #[test]
        fn whatever_a_stranger_sends_continues_a_list_only_if_it_names_it(token in token()) {
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
