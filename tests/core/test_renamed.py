"Old names of arguments work, warn at the line of the caller, and are never taken beside the new one."
import inspect
import warnings

import pytest

from mmembed.core.renamed import renamed, warn_renamed


@renamed(k='top_k', filter='where')
def search(query, top_k=10, where=None):
    "Find rows."
    return query, top_k, where


def test_old_names_warn_at_the_line_of_the_caller():
    with pytest.warns(DeprecationWarning) as seen: found = search('cat', k=3, filter='year > 2020')
    assert found == ('cat', 3, 'year > 2020')
    assert [str(w.message) for w in seen] == [
        'search(k=) is now search(top_k=)', 'search(filter=) is now search(where=)',
    ]
    assert {w.filename for w in seen} == {__file__}


def test_present_names_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert search('cat', 3) == search('cat', top_k=3) == ('cat', 3, None)


def test_the_signature_is_the_present_one():
    assert list(inspect.signature(search).parameters) == ['query', 'top_k', 'where']
    assert (search.__name__, search.__doc__) == ('search', 'Find rows.')


@pytest.mark.parametrize('call', [lambda: search('cat', 3, k=5), lambda: search('cat', top_k=3, k=5)])
def test_both_names_at_once_are_refused(call):
    with pytest.raises(TypeError, match='k is an older name of top_k: pass only top_k'): call()


def test_an_attribute_warns_where_it_is_read():
    def old(): warn_renamed('Index.bad', 'Index.failures')
    with pytest.warns(DeprecationWarning, match='Index.bad is now Index.failures') as seen: old()
    assert seen[0].filename == __file__
