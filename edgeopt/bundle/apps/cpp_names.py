"""Names that generated C++ must not use."""

from __future__ import annotations

from edgeopt.bundle.apps.base import words

#: Keywords and alternative tokens of C++20.
KEYWORDS = words(
    """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t char32_t class compl
    concept const consteval constexpr constinit const_cast continue co_await co_return co_yield decltype default delete
    do double dynamic_cast else enum explicit export extern false float for friend goto if inline int long mutable
    namespace new noexcept not not_eq nullptr operator or or_eq private protected public register reinterpret_cast
    requires return short signed sizeof static static_assert static_cast struct switch template this thread_local throw
    true try typedef typeid typename union unsigned using virtual void volatile wchar_t while xor xor_eq
    """
)
#: Lower-case macros of common platforms, which would be replaced in the middle of our code.
MACROS = words(
    "assert emit errno far i386 interface linux major max min minor near signals slots small stderr stdin stdout unix "
    "foreach arm mips sun vax"
)
FIELD_NAMES = KEYWORDS | MACROS | {"std", "edgeopt"}

#: A model's name is a namespace in `edgeopt`, the stem of two files and a target of CMake.
MODEL_NAMES = FIELD_NAMES | words(
    """
    all clean depend edit_cache help install list_install_components package package_source preinstall rebuild_cache
    test golden_test c m dl rt z log android atomic gcc gomp pthread stdc values image checks litert litert_c_api
    onnxruntime executorch edgeopt_model edgeopt_values
    edgeopt_image extension_module_static extension_tensor extension_threadpool xnnpack_backend quantized_ops_lib
    optimized_native_cpu_ops_lib name_of size_of elements_of make_tensor text_of label_of check_inputs half_of
    float_of_half encode decode position_of fit numbers_of
    """
)
